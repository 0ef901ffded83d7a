"""Arguments: dataclasses whose fields are flags, and the resolver that fills them."""
