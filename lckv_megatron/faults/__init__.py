"""The fault campaign: saves that are killed, files that are damaged or malicious, clients that misbehave."""
