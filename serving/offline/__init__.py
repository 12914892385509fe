"""`graft generate --offline`: a table of any size answered on the cluster by engines, no HTTP.

`answering` is the work on one part, by the gateway's core over an engine of this process; `output`
is what is kept of a run and where it goes on; `pool` is Ray Data around them.
"""
