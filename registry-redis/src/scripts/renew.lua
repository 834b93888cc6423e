-- ARGV: 4 owner, 5 ttl, 6 '1' to look only, 7 the head after what the owner put last, or '', then ids. Answers the
-- positions, from 0, of those that are not ours, or not alive if it only looks; false where there is nothing at all, or
-- what was put last was lost: older records of ours may be here in its place.
local owner, ttl, dry = ARGV[4], ARGV[5], ARGV[6] == '1'
if not open() then return false end

-- Whether the log lacks an entry that it had: it is older than that, or another one.
local function lacks(known)
  local id, n = string.match(known, '^(%d+%-%d+)/(.*)$')
  if not id or say == '' then return false end
  local entry = redis.call('XRANGE', L, id, id)[1]
  if entry then return entry[2][4] ~= n end
  -- Trimmed, unless there are older ones. Where there are none at all, the head tells.
  local first = redis.call('XRANGE', L, '-', '+', 'COUNT', 1)[1]
  local at = first and first[1] or string.match(head, '^%d+%-%d+')
  local function parse(text) local t, s = string.match(text, '(%d+)%-(%d+)') return tonumber(t), tonumber(s) end
  if not at then return false end
  local t, s = parse(at)
  local time, sequence = parse(id)
  return t < time or (t == time and s < sequence)
end

local lost = lacks(ARGV[7])
if look() and not dry then redis.call('HSET', R, '~seen', now, '~safe', safe) end
if not dry then heal() end
local missing, renewed, scores, ends = {}, {}, nil, now + ttl .. ''
local values = redis.call('HMGET', R, unpack(ARGV, 8))
if dry then scores = redis.call('ZMSCORE', X, unpack(ARGV, 8)) end
for k, v in ipairs(values) do
  local o, _, l = '', 0, 0
  if v then o, _, l = split(v) end
  if o ~= owner then missing[#missing + 1] = k - 1
  elseif l > 0 and dry then
    if now >= safe and scores[k] and tonumber(scores[k]) <= now then missing[#missing + 1] = k - 1 end
  elseif l > 0 then
    renewed[#renewed + 1] = ends
    renewed[#renewed + 1] = ARGV[k + 7]
  end
end
if #renewed > 0 then redis.call('ZADD', X, unpack(renewed)) end
if not dry then
  reap(dead(200))
  tell()
  keep()
end
return not lost and missing
