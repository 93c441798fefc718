"""A study's tables and images -> one page that a person reads, and that needs nothing beside it."""
