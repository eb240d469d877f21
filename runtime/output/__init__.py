"""What commands print and write: console lines, HTML pages, images with boxes."""
