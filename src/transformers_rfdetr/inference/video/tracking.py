"""Track ids: numbers that objects keep from frame to frame."""

from dataclasses import replace

import numpy as np

from ..instances import Instances


class Tracker:
    """Gives each object an id that it keeps from frame to frame: ByteTrack, from Roboflow's `trackers`.

    Args:
        frame_rate: Frames per second. An object is remembered for one second after it was last detected.
        start_score: The score that starts a track; an instance below it can only continue one.

    Raises:
        ImportError: trackers is not installed.
    """

    def __init__(self, frame_rate: float, *, start_score: float = 0.5) -> None:
        try:
            import supervision
            from trackers import ByteTrackTracker
        except ImportError as error:
            raise ImportError(
                f'tracking requires trackers: pip install "transformers-rfdetr[track]" ({error})'
            ) from error
        self._detections = supervision.Detections
        self._tracker = ByteTrackTracker(
            frame_rate=frame_rate, track_activation_threshold=start_score, high_conf_det_threshold=start_score
        )

    def update(self, instances: Instances) -> Instances:
        """Return the next frame's K instances, in order, with `track_ids` (K,); -1 in an object's first frame."""
        indices = np.arange(len(instances))
        detections = self._detections(xyxy=instances.boxes, confidence=instances.scores, data={"index": indices})
        tracked = self._tracker.update(detections)  # in another order
        track_ids: np.ndarray = np.full(len(instances), -1, np.int64)
        if len(tracked):
            track_ids[tracked.data["index"]] = tracked.tracker_id
        return replace(instances, track_ids=track_ids)
