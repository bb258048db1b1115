"""A finished folder: loaded to run packed, offloaded, audited, reported on."""
