"""One module a data set, each reading files as their publishers ship them."""

__all__ = ["coco", "flickr30k", "hnc"]
