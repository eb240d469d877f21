"""Output of the commands: console lines, HTML pages and images with boxes."""
