-- ARGV: 4 owner, 5 '1' to remove whoever wrote it, 6 for how long the owner is gone for good ('' if it is not), then ids.
-- Answers 1 or 0 for each. The deletions come first: a full store lets them pass, and then what follows them.
local owner, force, gone = ARGV[4], ARGV[5] == '1', ARGV[6]
local out = {}
-- One that was written by hand has no history yet.
local known, fresh = open(redis.call('HLEN', R) > 0 and '0')
if fresh then heal() end
if known then
  for i = 7, #ARGV do
    local old = redis.call('HGET', R, ARGV[i])
    if old and (force or split(old) == owner) then
      redis.call('HDEL', R, ARGV[i])
      redis.call('ZREM', X, ARGV[i])
      note(force and 'dropped' or 'left', ARGV[i])
      out[#out + 1] = 1
    else
      out[#out + 1] = 0
    end
  end
  tell()
  keep()
end
if gone ~= '' then redis.pcall('SET', KEYS[#KEYS], '1', 'PX', gone) end
return out
