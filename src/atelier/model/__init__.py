"""The words of Atelier: ids, enums, state tables, quantities, errors and frozen dataclasses.

Every other room may import these; this room imports the standard library alone and never performs input or output.
"""
