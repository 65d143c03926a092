"""The command line of curvkit: parse, call the library, render."""
