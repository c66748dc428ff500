"""Use cases, one file per resource: authorise, validate, one short transaction, start a saga; and queries.

Called by ``api`` alone. Services return values of ``model``; they know no HTTP.
"""
