"""Admission: knows every executor's load and which of them takes a request; holds no request."""
