"""The one training loop and what a step is made of. Begin with loop.py and run_config.py."""
