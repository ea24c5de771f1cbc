"""Videos and live streams: read, predict, track, draw and write them frame by frame."""
