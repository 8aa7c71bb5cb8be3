"""Devices. Everything that depends on where tensors live asks a `DeviceBackend`."""
