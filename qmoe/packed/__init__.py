"""A finished folder: loaded, saved, audited, reported on."""
