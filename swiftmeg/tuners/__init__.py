"""What is trained: every weight, some of them, or adapters beside them."""
