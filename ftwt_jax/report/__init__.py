"""The command `report`: what runs have reached, as one page and its plots."""
