"""Write annotated images in the formats that are read, one file for each format.

`supervision` writes COCO and YOLO too, but its polygons lead through the centers of the outer pixels of a mask, from
which pycocotools draws a smaller one.
"""
