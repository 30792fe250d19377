"""Each file answers one question; README.md has the answers. A package, lest another of the name be found first."""
