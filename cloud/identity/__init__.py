"""Who is who on the wire: the certificate authority, certificates of vehicles and servers, what the broker enforces."""
