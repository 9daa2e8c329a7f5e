"""What conversions and evaluations left as JSON -> one page that explains it, as HTML or as markdown.

Only documents are read (quantkit.json, evaluation.json): a report can be made where the weights are not. Data goes
documents -> checkpoints (which scores belong to which checkpoint) -> contents (tables and figures) -> page or markdown.
"""
