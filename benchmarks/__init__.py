"""What ``make bench`` measures: the bridge against the same peers without it, in the same run."""
