"""What the command line and a notebook have in common: functions with every command's options, progress, and results
as text or as documents.

`quantkit` itself re-exports what users need; nothing here loads torch before work begins.
"""
