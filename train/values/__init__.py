"""Values of records: parsing text from files and clients, and comparing values by content."""
