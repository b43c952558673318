"""One file per method; each runs alone: `python algos/ooo_iql.py --help`."""
