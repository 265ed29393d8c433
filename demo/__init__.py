"""The demonstration and what it shares with tests and benchmarks: a real ComfyUI, driven from outside."""
