"""Things in pictures, named in words: geometry, vocabularies, the detector's results, tracks.

Nothing is imported here: mammut's training imports `detection.letterbox` alone.
"""
