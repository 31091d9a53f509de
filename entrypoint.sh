#!/bin/sh
# Start the service as the owner of /data, or as uid 10001 where that is root, but never as root.
set -eu
case "${WEB_CONCURRENCY:=4}" in  # gunicorn itself answers a bad one with a traceback
    *[!0-9]*) echo "WEB_CONCURRENCY: '$WEB_CONCURRENCY' is not a whole number, as 4 is" >&2; exit 1 ;;
esac
if [ "$(id -u)" = 0 ]; then
    owner=$(stat -c %u:%g /data)
    [ "${owner%:*}" != 0 ] || owner=10001:10001
    chown -R "$owner" /data || echo "cannot make all of /data the property of $owner" >&2
    set -- setpriv --reuid "${owner%:*}" --regid "${owner#*:}" --clear-groups --no-new-privs "$@"
fi
exec "$@"
