"""Reading: files of all supported formats as tables of records, in parts that fit in memory."""
