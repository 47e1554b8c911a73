"""Checkpoints of others into model folders: `tessera import`.

A module per format, with
- `ENTRY`: where the format's files keep their tensors, named in remedies;
- `convert(entries)`: what a file holds, under our names, by a table of rules (`pipeline.checkpoints.tables`);
- `describe(converted, source)`: the model folder's config and a model to compare names and shapes with;
- `CARD`, if it is not config.json: the hub's description beside the weights;
- `COPIED`, if any: files that the model needs in its folder.
Every name must be used or be ignored by a rule that says why, and every tensor of the model must be there.
"""
