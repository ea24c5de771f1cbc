"""What RF-DETR is: configuration, networks, loss, image processor. Everything here can be pushed with a checkpoint."""
