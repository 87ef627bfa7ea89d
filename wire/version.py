"""The version of fsd: what `fsd version`, `fsd status` and the package's metadata show; told once, here."""

VERSION = "0.1.0"
