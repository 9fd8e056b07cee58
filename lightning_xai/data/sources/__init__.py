"""One module a data set, each reading files as their publishers ship them."""

__all__ = ["coco", "conceptual_captions", "flickr30k", "hnc", "img2dataset", "ms_cxr", "roco", "rsicd"]
