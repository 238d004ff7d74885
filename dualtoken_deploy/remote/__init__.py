"""A command on another machine: over OpenSSH, with copies that are checked by hash and nothing half-done left there."""
