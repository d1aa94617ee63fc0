"""What the vehicle says and understands: signals, mappings, messages, topics and the bundle's manifest.

Everything here is a value or a pure function over bytes and arrays: no I/O, no clock, no logging. Every other
package may import it; it imports nothing else of ours.
"""
