"""Write annotated images in the formats that are read, one file for each format."""
