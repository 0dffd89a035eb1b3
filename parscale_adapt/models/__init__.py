"""Models that own their streams: standalone checkpoints, and the layout that the authors published."""
