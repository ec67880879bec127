#!/bin/sh
# The power button of the conformance guest.
exec /bin/poweroff -f
