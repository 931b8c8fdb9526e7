"""The proof behind `verify --against`: a second reading of the source that shares no code with the
modules that write shards. A mistake there cannot repeat itself here.
"""
