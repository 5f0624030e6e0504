"""The strategies: a module each, with `class Strategy` and typed `Knobs`. The folder is the list."""
