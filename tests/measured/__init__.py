"""The numbers on the pages are those of the committed runs."""
