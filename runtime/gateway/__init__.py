"""An endpoint picker in front of real engines, behind Envoy."""
