"""One small picture that draws a frozen vision transformer's attention to where it is pasted."""
