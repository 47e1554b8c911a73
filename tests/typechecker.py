"""The run-time type checker that the import hook in conftest.py applies to `pipeline`."""

from beartype import BeartypeConf, beartype

# An int is a fine float, as PEP 484 has it.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
