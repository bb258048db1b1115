"""What the help of several options says."""

TEXT_HELP = (
    "text, comma separated or repeated: bundled[:DOMAIN+DOMAIN], heldout[:DOMAIN+DOMAIN], "
    "PATH[:COLUMN] of a file, folder or glob, or hf:NAME[/CONFIG][:SPLIT[:COLUMN]] for a dataset"
)
SIZE_HELP = "as in 12GB (10^9 bytes each), 12GiB (2^30) or 500MB"
KV_HELP = (
    "keys and values of the cache: as the model computes them, or in 8 bits with a scale for each "
    "token and head"
)
