"""Reading: files of every format as records, part by part."""
