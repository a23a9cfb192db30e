"""What operators rely on: outages, fail-over, upgrades, backups."""
