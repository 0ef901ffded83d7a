"""From files and hub ids to micro-batches: rows, formats, chat templates, packing, loaders.

Nothing in this package imports Megatron or any other part of swiftmeg but `swiftmeg.errors` and
`swiftmeg.cache`.
"""
