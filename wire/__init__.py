"""What every process speaks: frames, typed messages, numbered errors, checksums, RPC.

The lowest floor.  It decides nothing: it carries what the floors above have decided.
"""
