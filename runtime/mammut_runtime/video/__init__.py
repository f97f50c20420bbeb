"""Clips: decoded, sampled, cut into scenes, captioned, asked and searched.

    decode.py     a clip as frames with the container's times, whatever is damaged in it
    sampler.py    which frames are looked at, within a budget
    scenes.py     where a clip is cut
    encode.py     frames to what the decoder reads: `Model.encode_video`
    captions.py   scenes to cues: `Model.caption_video`
    cues.py       cues, their merging, and their files: SRT, WebVTT, JSON lines
    journal.py    what was captioned so far, so that a killed run goes on where it was
    subtitles.py  a clip to its files, through the journal
    cluster.py    many clips to their files, over a Ray cluster
    moments.py    moments of clips by text, from an index
    commands.py   mammut-run caption-video, ask-video, find-video

Nothing is imported before it is needed. There is no torch here, and no audio.
"""
