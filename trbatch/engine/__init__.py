"""The engine: everything that touches a device. Import its modules, not this package."""
