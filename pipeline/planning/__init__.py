"""What a run will cost, before it starts: a rehearsal on a few images, scaled to the whole.

`rehearsal` runs every stage's own code in small checkouts and measures it, `amounts` says how many images the whole
run has, `estimate` scales one to the other, and `disk` holds the bytes against what is free.
"""
